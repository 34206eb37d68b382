"""What a run left in its folder, read by whoever asks: offline, without torch. Runs in: main."""
