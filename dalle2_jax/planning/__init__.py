"""What a config takes of devices that are not there, as the compiler says."""
