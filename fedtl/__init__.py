"""fedtl: federated transfer learning, in simulation and for real.

The command line is ``fedtl`` (see ``fedtl --help``); a scenario in TOML says what to run.
"""
