"""Makes and checks repositories of the Hub."""
