"""What a run leaves behind: records, commits, the run folder."""
