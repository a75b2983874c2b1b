//! The pipeline of steps that have been received and not been answered. A step goes through three states: its forward
//! pass is launched, then its sampling is launched, and then its results are collected. Sampling may have to wait for
//! masks or for results of the step before. The pass of the next step needs the sampled tokens, so that it is launched
//! after the sampling.

use std::{collections::VecDeque, time::Instant};

use kernels::Backend;

use super::{
    pass::Forwarded,
    sampling::Launched,
    state::{State, StepError},
};
use crate::step::{Masks, Step, StepResult};

/// The largest number of steps on the device at the same time.
const MAX_LAUNCHED: usize = 2;

/// All steps in flight.
pub(super) struct Pipeline<B: Backend> {
    /// Steps that have not been launched, with the times at which they arrived. An error stands for an invalid one.
    waiting: VecDeque<(Instant, Result<Box<Step>, StepError>)>,
    /// The step whose pass has been launched, but not its sampling.
    forwarded: Option<Forwarded<B>>,
    /// Steps that have been launched completely, oldest first.
    launched: VecDeque<Launched<B>>,
}

impl<B: Backend> Default for Pipeline<B> {
    fn default() -> Pipeline<B> {
        Pipeline { waiting: VecDeque::new(), forwarded: None, launched: VecDeque::new() }
    }
}

impl<B: Backend> Pipeline<B> {
    /// Adds a step, or the error of an invalid one.
    pub(super) fn push(&mut self, step: Result<Box<Step>, StepError>) {
        self.waiting.push_back((Instant::now(), step));
    }

    /// Adds masks to their step. They are ignored if it is not in flight.
    pub(super) fn add_masks(&mut self, Masks { step: id, masks, .. }: Masks) {
        if let Some(forwarded) = self.forwarded.as_mut().filter(|forwarded| forwarded.id == id) {
            return forwarded.add_masks(masks);
        }
        let mut steps = self.waiting.iter_mut().filter_map(|(_, step)| step.as_mut().ok());
        if let Some(step) = steps.find(|step| step.id == id) {
            step.masks.extend(masks);
        }
    }

    /// Whether a step is running on the device, so that its end has to be polled for.
    pub(super) fn is_running(&self) -> bool {
        !self.launched.is_empty()
    }

    /// When the oldest step arrived of those whose end depends only on the device.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.launched.front().map(Launched::started)
    }

    /// Launches all steps that can be launched. The inner error is the router's fault. It is returned when all steps
    /// before it have been answered; those after it are dropped.
    pub(super) fn launch(&mut self, state: &mut State<B>) -> kernels::Result<Result<(), StepError>> {
        loop {
            if let Some(forwarded) = self.forwarded.take() {
                if !forwarded.can_sample(self.is_running()) {
                    self.forwarded = Some(self.pause(state, forwarded)?);
                    return Ok(Ok(()));
                }
                let started = forwarded.started;
                match state.launch_sampling(forwarded)? {
                    Ok(launched) => self.launched.push_back(launched),
                    Err(error) => self.waiting.push_front((started, Err(error))),
                }
                continue;
            }
            let full = self.launched.len() == MAX_LAUNCHED;
            if full || self.launched.iter().any(Launched::holds_activations) {
                return Ok(Ok(()));
            }
            match self.waiting.pop_front() {
                None => return Ok(Ok(())),
                Some((started, Ok(step))) => match state.launch_forward(*step, started)? {
                    Ok(forwarded) => self.forwarded = Some(forwarded),
                    Err(error) => self.waiting.push_front((started, Err(error))),
                },
                Some((started, Err(error))) if self.is_running() => {
                    self.waiting.push_front((started, Err(error)));
                    return Ok(Ok(()));
                }
                Some((_, Err(error))) => {
                    self.waiting.clear();
                    return Ok(Err(error));
                }
            }
        }
    }

    /// Marks the end of a pass whose sampling has to wait.
    fn pause(&self, state: &State<B>, mut forwarded: Forwarded<B>) -> kernels::Result<Forwarded<B>> {
        if forwarded.end.is_none() {
            forwarded.end = Some(state.ops.mark()?);
        }
        Ok(forwarded)
    }

    /// Returns the result of the oldest step on the device, if it has ended.
    pub(super) fn poll(&mut self, state: &mut State<B>) -> kernels::Result<Option<StepResult>> {
        let ready = self.launched.pop_front_if(|launched| state.is_ready(launched));
        ready.map(|launched| state.collect(launched)).transpose()
    }

    /// Waits for the steps on the device, and drops all steps.
    pub(super) fn abandon(&mut self, state: &mut State<B>) -> kernels::Result<()> {
        self.waiting.clear();
        while let Some(launched) = self.launched.pop_front() {
            state.collect(launched)?;
        }
        if let Some(forwarded) = self.forwarded.take() {
            let end = state.ops.mark()?;
            state.ops.seconds_between(&forwarded.begin, &end)?;
        }
        Ok(())
    }
}
