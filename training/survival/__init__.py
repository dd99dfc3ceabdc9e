"""What lets a run live on: heartbeats and the watchdog, what lives cost, which ranks are slow."""
