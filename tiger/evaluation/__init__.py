"""Health checks of every stage."""
