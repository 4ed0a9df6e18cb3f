"""Win rates: judges that say which of two responses is better, and what their replies show."""
