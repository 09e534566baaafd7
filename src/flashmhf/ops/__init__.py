"""The operator: one function, its backends, and nothing above them. Imports torch only."""
