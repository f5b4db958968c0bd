"""What happens at central is told to addresses outside: journal events in, signed requests out."""
