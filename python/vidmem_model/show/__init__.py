"""What the user looks at: tables and plots."""
