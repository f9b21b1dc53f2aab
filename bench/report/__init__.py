"""Tables, pictures and bars from a saved comparison."""
