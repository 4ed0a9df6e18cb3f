"""Every form of docs/data.md parses to the record that the page says."""
