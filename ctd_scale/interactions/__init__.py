"""Raw logs and catalogues become clean, split, densely indexed sequences."""
