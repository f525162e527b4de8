"""The way from the store to the trainer: which packs a rank trains, their memory, and their copy to the device."""
