"""What other projects need to run FlashMHF: one module per project, none of which is imported by the package itself."""
