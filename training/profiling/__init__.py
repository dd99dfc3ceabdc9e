"""What chosen steps of a run leave behind about their time: the pipeline's timeline, torch's profile, the network."""
