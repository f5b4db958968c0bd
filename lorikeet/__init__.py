"""What both programs need of their machine: files, locks, time, pauses, logs, command lines."""
