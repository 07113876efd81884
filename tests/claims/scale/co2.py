"""CO2's outer step loses its penalty and its clip: its arm is the off arm."""

from broken import Case

from turnout.train.local import CO2


def unguarded(monkeypatch):
    outer = CO2._outer

    def step(self, then_N, mean_N):
        self._penalty, self._clip = False, None
        outer(self, then_N, mean_N)

    monkeypatch.setattr(CO2, "_outer", step)


CASE = Case(unguarded, small={"_STEPS": 60})
