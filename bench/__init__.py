"""Figures and the demonstration. Everything here drives the `stripewell` command from outside."""
