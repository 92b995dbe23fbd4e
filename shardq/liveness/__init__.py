"""Who is alive: signals, ranks that are gone, work that stands still."""
