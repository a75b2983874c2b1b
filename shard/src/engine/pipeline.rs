//! The steps that have come and have not been answered. A step goes through three states: its forward pass is launched,
//! then its sampling, and then its results are collected. Sampling may have to wait, for a mask or for results of the
//! step before. The pass of the next step begins when it has been launched, because that needs the sampled tokens.

use std::{collections::VecDeque, time::Instant};

use kernels::Backend;

use super::{
    pass::Forwarded,
    sampling::Launched,
    state::{State, StepError},
};
use crate::step::{Masks, Step, StepResult};

/// Steps that the device may have before the first of them has ended.
const MAX_LAUNCHED: usize = 2;

/// See the module.
pub(super) struct Pipeline<B: Backend> {
    /// Steps that have not begun, or what came in their place.
    waiting: VecDeque<(Instant, Result<Box<Step>, StepError>)>,
    forwarded: Option<Forwarded<B>>,
    /// Steps on the device, oldest first.
    launched: VecDeque<Launched<B>>,
}

impl<B: Backend> Default for Pipeline<B> {
    fn default() -> Pipeline<B> {
        Pipeline { waiting: VecDeque::new(), forwarded: None, launched: VecDeque::new() }
    }
}

impl<B: Backend> Pipeline<B> {
    /// Adds a step, or what is wrong with it.
    pub(super) fn push(&mut self, step: Result<Box<Step>, StepError>) {
        self.waiting.push_back((Instant::now(), step));
    }

    /// Adds masks to their step.
    pub(super) fn add_masks(&mut self, Masks { step: id, masks, .. }: Masks) {
        if let Some(forwarded) = self.forwarded.as_mut().filter(|forwarded| forwarded.id == id) {
            return forwarded.add_masks(masks);
        }
        let mut steps = self.waiting.iter_mut().filter_map(|(_, step)| step.as_mut().ok());
        if let Some(step) = steps.find(|step| step.id == id) {
            step.masks.extend(masks);
        }
    }

    /// Whether the device has something to do that has to be polled for.
    pub(super) fn is_running(&self) -> bool {
        !self.launched.is_empty()
    }

    /// When the oldest step began whose end depends on the device alone.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.launched.front().map(Launched::started)
    }

    /// Launches all that can be launched. An error that comes back is the router's, and the steps behind it are
    /// forgotten; everything before it has been answered.
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

    /// Marks the end of a pass that sampling does not follow at once.
    fn pause(&self, state: &State<B>, mut forwarded: Forwarded<B>) -> kernels::Result<Forwarded<B>> {
        if forwarded.end.is_none() {
            forwarded.end = Some(state.ops.mark()?);
        }
        Ok(forwarded)
    }

    /// The result of the oldest step on the device, if it has ended.
    pub(super) fn poll(&mut self, state: &mut State<B>) -> kernels::Result<Option<StepResult>> {
        let ready = self.launched.pop_front_if(|launched| state.is_ready(launched));
        ready.map(|launched| state.collect(launched)).transpose()
    }

    /// Forgets all steps once the device has ended them.
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
