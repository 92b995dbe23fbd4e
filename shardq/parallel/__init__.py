"""Communication between ranks: the only code that talks to other processes, with liveness/."""
