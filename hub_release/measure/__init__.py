"""Tables of sizes, cost and speed."""
