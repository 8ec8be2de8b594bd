"""What a DINO costs, measured: operators, waits, memory and time, against MMDetection's own."""
