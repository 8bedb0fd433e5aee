"""Where bytes become durable: files and folders on a disk or in an object store, written completely or not at all."""
