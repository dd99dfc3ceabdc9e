"""The front door: the `orthant` command, the typed configuration, its checks and the doctor."""
