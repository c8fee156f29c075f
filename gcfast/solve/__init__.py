"""Phase two, solved: the head of least loss nearest to where training left it, with a duality gap."""
