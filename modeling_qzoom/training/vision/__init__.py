"""VISOR: the decoder under its configurations, and the router among them."""
