"""Other programs' layouts of GPT-2, one adapter a file."""
