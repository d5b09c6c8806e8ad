"""The command line: ``infobatch-mm SUBCOMMAND``, a file for each subcommand.

``subcommands.py`` lists them. Only the one that is called is imported, since most import a host.
"""
