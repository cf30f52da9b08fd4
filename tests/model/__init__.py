"""The ledger's protocol as a small formal model, explored exhaustively, and held against the real ledger."""
