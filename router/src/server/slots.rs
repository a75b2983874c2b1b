//! Places for connections: how many there are, how many one address may have, and a reserve.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::principal::{Tenant, TenantId};

/// One place in so many belongs to the reserve.
const RESERVED: usize = 16;

/// The reason that a connection gets no slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoSlot {
    /// Its address has as many as it may have.
    Address,
    /// All are taken, those of the reserve as well.
    Full,
}

/// All places. The last ones are a reserve: when only those are left, a connection gets one of them for a single
/// request, and only if its tenant has less than its share of all connections.
pub(super) struct Slots {
    bound: usize,
    per_address: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    taken: usize,
    reserved: usize,
    addresses: HashMap<IpAddr, usize>,
    /// Weight of every tenant that has connections, and their number.
    tenants: HashMap<TenantId, (u64, usize)>,
}

/// The place of one connection, which is free again when this is dropped.
pub(super) struct Slot {
    slots: Arc<Slots>,
    pub(super) address: IpAddr,
    /// Whether it is one of the reserve.
    pub(super) reserved: bool,
    /// The tenant that sent the last request.
    tenant: Mutex<Option<TenantId>>,
}

impl Slots {
    pub(super) fn new(bound: usize, per_address: usize) -> Arc<Slots> {
        Arc::new(Slots { bound, per_address, state: Mutex::default() })
    }

    /// Takes a place for a connection from an address.
    pub(super) fn take(self: &Arc<Slots>, address: IpAddr) -> Result<Slot, NoSlot> {
        let mut state = self.lock();
        if state.addresses.get(&address).is_some_and(|taken| *taken >= self.per_address) {
            return Err(NoSlot::Address);
        }
        if state.taken >= self.bound {
            return Err(NoSlot::Full);
        }
        // A server of one place has no reserve.
        let reserve = (self.bound / RESERVED).max(1).min(self.bound - 1);
        let reserved = state.taken - state.reserved >= self.bound - reserve;
        state.taken += 1;
        state.reserved += usize::from(reserved);
        *state.addresses.entry(address).or_default() += 1;
        Ok(Slot { slots: self.clone(), address, reserved, tenant: Mutex::new(None) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn leave(&mut self, tenant: Option<TenantId>) {
        let Some(id) = tenant else { return };
        if let Some((_, connections)) = self.tenants.get_mut(&id) {
            *connections -= 1;
            if *connections == 0 {
                self.tenants.remove(&id);
            }
        }
    }
}

impl Slot {
    /// The connection belongs to a tenant from now on. Returns whether the tenant may use it: a place of the reserve
    /// is for tenants that have less than their share.
    pub(super) fn belongs_to(&self, tenant: &Tenant) -> bool {
        let mut owner = self.tenant.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.slots.lock();
        if *owner != Some(tenant.id) {
            state.leave(*owner);
            state.tenants.entry(tenant.id).or_default().1 += 1;
            *owner = Some(tenant.id);
        }
        let entry = state.tenants.entry(tenant.id).or_default();
        entry.0 = u64::from(tenant.weight);
        let connections = entry.1 as u128;
        let weights: u64 = state.tenants.values().map(|(weight, _)| weight).sum();
        let share = self.slots.bound as u128 * u128::from(tenant.weight);
        !self.reserved || connections * u128::from(weights) < share
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let owner = self.tenant.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let mut state = self.slots.lock();
        state.leave(owner);
        state.taken -= 1;
        state.reserved -= usize::from(self.reserved);
        if let Some(taken) = state.addresses.get_mut(&self.address) {
            *taken -= 1;
            if *taken == 0 {
                state.addresses.remove(&self.address);
            }
        }
    }
}
