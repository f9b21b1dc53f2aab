"""What is made of a saved comparison: tables, pictures, bars."""
