"""Tables, plots and the contact sheet."""
