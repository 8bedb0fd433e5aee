"""The promises of Onym under other people's trainers. Each module imports its peer, and nothing else imports the module.

A checkpoint of each has the model under its own names, whatever wraps it, and is written durably: it is there completely or not
at all. ``docs/integrations.md`` shows each in ten lines.
"""
