"""Small environments with a known script, registered for the tests."""

import os
import random
import time
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a GPU of compute capability 8.0 or later",
)


class Scripted(gym.Env):
    """Observation [episode, step]. Episodes end in turn: terminated at step 3, truncated at step 4, both at step 2."""

    action_space = gym.spaces.Box(np.array([-1.0, 0.0, -3.0], np.float32), np.array([1.0, 0.5, 1.0], np.float32))

    def __init__(self, shape=(2,), reward=None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, shape, np.float64)
        self.reward = reward
        self.episode = -1

    def _obs(self):
        obs = np.zeros(self.observation_space.shape)
        obs.flat[:2] = self.episode, self.count
        return obs

    resets: ClassVar[list] = []  # (environment, seed) of every reset

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.resets.append((self, seed))
        self.episode += 1
        self.count = 0
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.count += 1
        kind = self.episode % 3
        terminated, truncated = self.count == (3, 99, 2)[kind], self.count == (99, 4, 2)[kind]
        reward = 10 * self.episode + self.count if self.reward is None else self.reward
        if self.reward == "action":
            reward = float(action @ np.array([1, 10, 100]))
        return self._obs(), reward, terminated, truncated, {}


class Rendered(Scripted):
    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 10}

    fails_after = 10**9  # renderings

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode, self.rendered = render_mode, 0

    def render(self):
        self.rendered += 1
        if self.rendered > self.fails_after:
            raise RuntimeError("context lost")
        return np.full((32, 32, 3), 20 * self.count, np.uint8)


class Broken(Scripted):
    """Not made for TD3: the spaces are set by the test."""

    def __init__(self, observation_space=None, action_space=None, error=None):
        if error:
            raise error
        super().__init__()
        self.observation_space = observation_space or self.observation_space
        self.action_space = action_space or self.action_space


class Wander(gym.Env):
    """A random walk on its generator, and on those of all if `draws`; episodes end after 2 to 8 steps."""

    def __init__(self, draws=False, length=(2, 9)):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.draws, self.lengths = draws, length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.length, self.count = self.np_random.normal(size=2), self.np_random.integers(*self.lengths), 0
        return self.place.copy(), {}

    def step(self, action):
        noise = random.gauss() + np.random.normal() if self.draws else 0.0  # some environments draw from these
        self.place = 0.9 * self.place + action + 0.1 * self.np_random.normal(size=2) + 0.1 * noise
        self.count += 1
        over = self.count >= self.length
        return self.place.copy(), -float(abs(self.place).sum()), over and self.length % 2 == 0, over, {}


class OldGenerator(Scripted):
    def reset(self, *, seed=None, options=None):
        self.np_random = np.random.RandomState(seed)
        return super().reset()


class Faulty(Scripted):
    """Fails in the way and at the step that `fault` says, counted over all episodes of this environment."""

    fault = os.environ.get("FAULT", "none")

    def __init__(self):
        super().__init__()
        self.steps = 0

    def reset(self, **options):
        obs = super().reset(**options)
        if self.fault.startswith("raises in reset") and self.steps >= int(self.fault.split(" at ")[1]):
            raise ZeroDivisionError
        return obs

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.steps += 1
        fault, _, step = self.fault.partition(" at ")
        if self.steps == int(step or 0):
            if fault == "raises":
                raise ZeroDivisionError
            if fault == "hangs":
                time.sleep(1000)
            if fault == "returns nothing":
                return None
            if fault == "returns four":
                return obs, reward, terminated, {}
            wrong = {"returns NaN": obs * np.nan, "returns too much": obs + 1e39, "returns a wrong shape": np.zeros(3)}
            obs = wrong.get(fault, obs)
            reward = {"rewards infinity": np.inf, "rewards a word": "much"}.get(fault, reward)
        return obs, reward, terminated, truncated, info


box = gym.spaces.Box(-1, 1, (2,), np.float32)
gym.register("Scripted-v0", Scripted)
gym.register("ScriptedMatrix-v0", Scripted, kwargs={"shape": (3, 2)})
gym.register("ScriptedHugeReward-v0", Scripted, kwargs={"reward": 1e39})  # infinite in float32
gym.register("ScriptedActionReward-v0", Scripted, kwargs={"reward": "action"})
CHEETAH = "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv"
gym.register("ShortCheetah-v0", CHEETAH, max_episode_steps=20)
gym.register("Rendered-v0", Rendered)
gym.register("Wander-v0", Wander)
gym.register("WanderDraws-v0", Wander, kwargs={"draws": True})
gym.register("WanderLong-v0", Wander, kwargs={"length": (10**6, 10**6 + 1)})
gym.register("Faulty-v0", Faulty)
gym.register("IntegerAction-v0", Broken, kwargs={"action_space": gym.spaces.Box(0, 5, (2,), np.int32)})
gym.register("OldGenerator-v0", OldGenerator)
gym.register("EmptyObs-v0", Broken, kwargs={"observation_space": gym.spaces.Box(-1, 1, (0,), np.float32)})
gym.register("EmptyAction-v0", Broken, kwargs={"action_space": gym.spaces.Box(-1, 1, (0,), np.float32)})
gym.register("LongAction-v0", Broken, kwargs={"action_space": gym.spaces.Box(-1, 1, (2,), np.longdouble)})
gym.register("DictObs-v0", Broken, kwargs={"observation_space": gym.spaces.Dict({"a": box})})
gym.register("Unbounded-v0", Broken, kwargs={"action_space": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)})
gym.register("MatrixAction-v0", Broken, kwargs={"action_space": gym.spaces.Box(-1, 1, (2, 2), np.float32)})
gym.register("Raises-v0", Broken, kwargs={"error": RuntimeError("no\nlicence")})
