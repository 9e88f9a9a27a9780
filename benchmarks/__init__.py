"""How fast the simulator is, against a bare compiled loop and a plain SimPy engine."""
