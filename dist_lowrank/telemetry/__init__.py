"""What a run says about itself: metrics per rank, speed, memory by cause, the console of rank 0."""
