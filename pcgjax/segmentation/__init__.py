"""From frames to states: decoding and scores."""
