"""What every wing uses: errors, files, settings, the machine, ranks."""
