"""Trained models behind the interface that everybody's clients speak, and pages to write in and to watch runs on."""
