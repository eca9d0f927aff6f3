"""Runs rdma-core's own tests and notes in a file what comes of each: a line when it starts, and a line when it ends.

Usage: outcomes.py TESTS NOTES [options of run_tests.py]. A test that the file has already is left out, so that whoever starts
this again goes on behind one that hung.

Under REVERBS_CHAOS there is another line when a test ends: how often the hardware was replaced meanwhile, and how often it could not
be, as the log of this process says.
"""

import os
import sys
import unittest
from importlib.machinery import SourceFileLoader

folder, path = sys.argv[1:3]
del sys.argv[1:3]
sys.path.insert(0, folder)
# As run_tests.py does it.
from args_parser import parser

tests = SourceFileLoader("tests", os.path.join(folder, "__init__.py")).load_module()
parser.parse_args()

notes = open(path, "a+", buffering=1)
notes.seek(0)
seen = {line.split()[1] for line in notes}


def note(outcome, test, reason=""):
    first = str(reason).strip().splitlines()[-1:] or [""]
    print(outcome, test.id(), first[0], file=notes)


def chaos():
    try:
        with open(f"{os.environ['REVERBS_RUNTIME_DIR']}/{os.getpid()}.log") as log:
            text = log.read()
    except FileNotFoundError:
        return 0, 0
    return text.count("hardware replaced"), text.count("hardware not replaced")


class Outcomes(unittest.TextTestResult):
    def startTest(self, test):
        super().startTest(test)
        note("start", test)
        if "REVERBS_CHAOS" in os.environ:
            self.before = chaos()

    def stopTest(self, test):
        super().stopTest(test)
        if "REVERBS_CHAOS" in os.environ:
            done, skipped = (now - before for now, before in zip(chaos(), self.before))
            note("chaos", test, f"{done} {skipped}")

    def addSuccess(self, test):
        super().addSuccess(test)
        note("pass", test)

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        note("skip", test, reason)

    def addFailure(self, test, error):
        super().addFailure(test, error)
        note("fail", test, error[1])

    def addError(self, test, error):
        super().addError(test, error)
        note("fail", test, error[1])

    def addSubTest(self, test, subtest, error):
        super().addSubTest(test, subtest, error)
        if error is not None:
            note("fail", test, error[1])


def single(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from single(test)
        elif test.id() not in seen:
            yield test


everything = unittest.defaultTestLoader.loadTestsFromModule(tests)
wanted = unittest.TestSuite(single(everything))
unittest.TextTestRunner(verbosity=2, resultclass=Outcomes).run(wanted)
print("end", "-", file=notes)
