"""A chat template that would run for ever, or fill the memory, ends in one error."""

import signal
import threading

import pytest
from helpers import chat_tokenizer

import plopfast as pf
from plopfast.data import deadline as module
from plopfast.data.deadline import check_template, deadline
from plopfast.support.errors import ModelError
