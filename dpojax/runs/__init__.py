"""One run: its stages in turn, its policies by name, and what is made of them."""
