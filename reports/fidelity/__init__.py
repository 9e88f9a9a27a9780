"""The fidelity study: real runs of many scenarios beside their simulations, on one page."""
