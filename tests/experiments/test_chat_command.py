"""`isoflop chat` answers what is typed, obeys its commands, and outlives Ctrl-C."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from model import ModelConfig
from model.convert import save_hf
from tests.infer.serve.conftest import write_tokenizer
