"""The one error a user may see: bad input, said in a line.

    UserError                 exit code 2, printed without a traceback
    ├── ConfigError           a config file or override (configs/loading.py)
    ├── DataError             a manifest, shard or sample (data_pipeline/)
    └── RunError              a run folder, checkpoint or export (pretrain/, launch/)

Everything else that is raised is our own mistake and keeps its traceback.
"""


class UserError(Exception):
    """Bad input. The message names the setting or file, what was found, what is allowed and what to do."""


class ConfigError(UserError):
    """One or more settings are wrong; the message has one line for each."""


class DataError(UserError):
    """A manifest, shard or sample cannot be used."""


class RunError(UserError):
    """A run folder, checkpoint or export cannot be used as asked."""
