"""Pages and pictures that show results."""
