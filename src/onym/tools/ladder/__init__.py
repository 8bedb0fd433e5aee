"""The book's steps to faster training, each measured on the user's own machine."""
