"""What is measured, tabulated and drawn of stored runs; the notebooks are made of it, and executed here."""
