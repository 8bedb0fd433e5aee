"""Where bytes become durable: files of this machine and objects of a store, written whole or not at all."""
