//! Admission: which requests are let in, and which are shed for others.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, time::Duration};

use lorax_router::{
    admission::{Admission, AdmissionId, Admitted, Asked, Refusal},
    principal::{Tenant, TenantId, TenantLimits},
};
use proptest::prelude::*;

fn tenant(id: u64, weight: u32) -> Tenant {
    Tenant { id: TenantId(id), name: format!("tenant {id}"), weight, limits: TenantLimits::default() }
}

fn limited(limits: TenantLimits) -> Tenant {
    Tenant { limits, ..tenant(1, 1) }
}

fn ask<'a>(tenant: &'a Tenant, adapter: Option<&'a str>) -> Asked<'a> {
    Asked { tenant, adapter, sequences: 1 }
}

const START: Duration = Duration::ZERO;

/// Lets in as many requests of one flow, and expects that nobody is shed for them.
fn fill(
    admission: &mut Admission,
    tenant: &Tenant,
    adapter: Option<&str>,
    requests: usize,
) -> Vec<AdmissionId> {
    let admit = |_| {
        let Admitted { id, shed } = admission.admit(ask(tenant, adapter), START).unwrap();
        assert_eq!(shed, []);
        id
    };
    (0..requests).map(admit).collect()
}

fn shed(admitted: &Admitted) -> Vec<AdmissionId> {
    admitted.shed.iter().map(|(id, _)| *id).collect()
}

#[test]
fn permits_come_back() {
    let mut admission = Admission::new(3);
    let one = tenant(1, 1);
    let held = fill(&mut admission, &one, None, 3);
    assert!(matches!(admission.admit(ask(&one, None), START), Err(Refusal::Full { .. })));
    assert!(admission.release(held[0], START));
    assert!(!admission.release(held[0], START), "only once");
    assert_eq!(admission.held(), 2);
    fill(&mut admission, &one, None, 1);
}

#[test]
fn a_newcomer_of_another_tenant_sheds_the_youngest_that_has_not_begun() {
    let mut admission = Admission::new(4);
    let (many, few) = (tenant(1, 1), tenant(2, 1));
    let held = fill(&mut admission, &many, None, 4);
    assert!(admission.begin(held[3]));
    let first = admission.admit(ask(&few, None), START).unwrap();
    assert_eq!(shed(&first), [held[2]], "the youngest has begun");
    let second = admission.admit(ask(&few, None), START).unwrap();
    assert_eq!(shed(&second), [held[1]]);
    assert!(!admission.begin(held[2]) && !admission.release(held[2], START), "it is gone");
    let third = admission.admit(ask(&few, None), START);
    assert!(matches!(third, Err(Refusal::Full { .. })), "both have their share");
}

#[test]
fn begun_answers_are_never_shed() {
    let mut admission = Admission::new(3);
    let (many, few) = (tenant(1, 1), tenant(2, 1));
    for id in fill(&mut admission, &many, None, 3) {
        assert!(admission.begin(id) && !admission.begin(id));
    }
    assert!(matches!(admission.admit(ask(&few, None), START), Err(Refusal::Full { .. })));
}

#[test]
fn the_longest_flow_of_a_tenant_gives_way_to_its_other_flows() {
    let mut admission = Admission::new(10);
    let one = tenant(1, 1);
    let long = fill(&mut admission, &one, Some("long"), 7);
    fill(&mut admission, &one, Some("short"), 3);
    let admitted = admission.admit(ask(&one, Some("new")), START).unwrap();
    assert_eq!(shed(&admitted), [long[6]]);
    let refused = admission.admit(ask(&one, Some("long")), START);
    assert!(matches!(refused, Err(Refusal::Full { .. })), "it would be the one to be shed");
    let fourth = admission.admit(ask(&one, Some("short")), START).unwrap();
    assert_eq!(shed(&fourth), [long[5]]);
    let fifth = admission.admit(ask(&one, Some("short")), START);
    assert!(fifth.is_err(), "the flows would only change places");
}

#[test]
fn shares_are_by_weight() {
    let mut admission = Admission::new(12);
    let (heavy, light, newcomer) = (tenant(1, 3), tenant(2, 1), tenant(3, 2));
    fill(&mut admission, &heavy, None, 6);
    let held = fill(&mut admission, &light, None, 6);
    // Of 6 weights the light tenant has one, hence 2 of 12 permits; the heavy one has its 6.
    for left in (2..6).rev() {
        let admitted = admission.admit(ask(&newcomer, None), START).unwrap();
        assert_eq!(shed(&admitted), [held[left]]);
    }
    assert!(admission.admit(ask(&newcomer, None), START).is_err());
}

#[test]
fn a_list_gets_all_its_permits_or_none() {
    let mut admission = Admission::new(6);
    let (many, few) = (tenant(1, 1), tenant(2, 1));
    let held = fill(&mut admission, &many, None, 6);
    for id in &held[..4] {
        admission.begin(*id);
    }
    let three = Asked { tenant: &few, adapter: None, sequences: 3 };
    assert!(admission.admit(three, START).is_err(), "only two can be shed");
    assert_eq!(admission.held(), 6);
    let two = Asked { sequences: 2, ..three };
    let admitted = admission.admit(two, START).unwrap();
    assert_eq!(shed(&admitted), [held[5], held[4]]);
    assert!(!admission.release(admitted.id, START) && admission.release(admitted.id, START));
    assert_eq!(admission.held(), 4);
}

#[test]
fn one_tenant_with_ten_thousand_requests_keeps_nobody_out() {
    let mut admission = Admission::new(10_000);
    let many = tenant(1, 1);
    fill(&mut admission, &many, Some("hot"), 10_000);
    for other in 2..200 {
        let few = tenant(other, 1);
        assert_eq!(admission.admit(ask(&few, None), START).unwrap().shed.len(), 1);
    }
    assert_eq!(admission.held(), 10_000);
    let again = admission.admit(ask(&many, Some("other")), START);
    assert_eq!(again.unwrap().shed.len(), 1, "nor out of the tenant's own other flows");
}

#[test]
fn a_tenant_has_limits_of_its_own() {
    let seconds = Duration::from_secs;
    let mut admission = Admission::new(100);
    let one = limited(TenantLimits { max_concurrent_requests: Some(2), ..TenantLimits::default() });
    let held = fill(&mut admission, &one, None, 2);
    let refused = admission.admit(ask(&one, Some("x")), START);
    assert!(matches!(refused, Err(Refusal::Concurrent { limit: 2, .. })), "{refused:?}");
    admission.release(held[0], START);
    fill(&mut admission, &one, None, 1);

    let mut admission = Admission::new(100);
    let one = limited(TenantLimits { requests_per_minute: Some(6), ..TenantLimits::default() });
    for id in fill(&mut admission, &one, None, 6) {
        admission.release(id, START);
    }
    let refused = admission.admit(ask(&one, None), seconds(1));
    assert_eq!(refused, Err(Refusal::Requests { limit: 6, retry_after: seconds(9) }));
    assert!(admission.admit(ask(&one, None), seconds(10)).is_ok());
    assert!(admission.admit(ask(&one, None), seconds(10)).is_err());

    let mut admission = Admission::new(100);
    let one = limited(TenantLimits { tokens_per_minute: Some(60), ..TenantLimits::default() });
    fill(&mut admission, &one, None, 1);
    admission.charge(&one, 59, START);
    fill(&mut admission, &one, None, 1);
    admission.charge(&one, 31, START);
    let refused = admission.admit(ask(&one, None), START);
    assert_eq!(refused, Err(Refusal::Tokens { limit: 60, retry_after: seconds(31) }));
    assert!(admission.admit(ask(&one, None), seconds(31)).is_ok(), "a token a second comes back");
}

#[test]
fn tokens_count_after_the_last_permit_has_gone_back() {
    let mut admission = Admission::new(100);
    let one = limited(TenantLimits { tokens_per_minute: Some(60), ..TenantLimits::default() });
    for id in fill(&mut admission, &one, None, 1) {
        admission.release(id, START);
    }
    admission.charge(&one, 60, START);
    let refused = admission.admit(ask(&one, None), START);
    assert_eq!(refused, Err(Refusal::Tokens { limit: 60, retry_after: Duration::from_secs(1) }));
}

#[test]
fn a_limit_of_zero_lets_nothing_in() {
    let zero = Some(0);
    for limits in [
        TenantLimits { max_concurrent_requests: Some(0), ..TenantLimits::default() },
        TenantLimits { requests_per_minute: zero, ..TenantLimits::default() },
        TenantLimits { tokens_per_minute: zero, ..TenantLimits::default() },
    ] {
        let one = limited(limits);
        for seconds in [0, 60, 100_000] {
            let refused = Admission::new(9).admit(ask(&one, None), Duration::from_secs(seconds)).unwrap_err();
            assert!(refused.retry_after() >= Duration::from_secs(1), "{refused:?}");
        }
    }
}

#[test]
fn how_long_to_wait_follows_the_pace_and_the_flow() {
    let mut admission = Admission::new(20);
    let one = tenant(1, 1);
    let held = fill(&mut admission, &one, None, 20);
    let full = |admission: &mut Admission, at| match admission.admit(ask(&one, None), at) {
        Err(Refusal::Full { retry_after }) => retry_after,
        other => panic!("{other:?}"),
    };
    assert_eq!(full(&mut admission, START), Duration::from_secs(1), "nothing is known");
    for (tick, id) in (1..).zip(&held[..10]) {
        let at = Duration::from_millis(500 * tick);
        admission.release(*id, at);
        admission.admit(ask(&one, None), at).unwrap();
    }
    assert_eq!(full(&mut admission, START), Duration::from_millis(10_500), "21 of two a second");
}

/// One action of a random history.
#[derive(Debug, Clone)]
enum Act {
    Admit { tenant: usize, adapter: usize, sequences: usize },
    Begin(usize),
    Release(usize),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let admit = (0..4usize, 0..3usize, prop_oneof![9 => Just(1usize), 1 => 2..5usize])
        .prop_map(|(tenant, adapter, sequences)| Act::Admit { tenant, adapter, sequences });
    let act = prop_oneof![
        4 => admit,
        1 => any::<prop::sample::Index>().prop_map(|at| Act::Begin(at.index(1000))),
        1 => any::<prop::sample::Index>().prop_map(|at| Act::Release(at.index(1000))),
    ];
    prop::collection::vec(act, 1..300)
}

#[derive(Debug, Clone, Copy)]
struct Held {
    tenant: usize,
    adapter: usize,
    permits: usize,
    begun: bool,
}

/// The requests that hold permits, as the rules of the module's documentation say.
#[derive(Debug, Clone, Default)]
struct Model(BTreeMap<AdmissionId, Held>);

const NAMES: [Option<&str>; 3] = [None, Some("a"), Some("b")];

impl Model {
    fn held(&self, wanted: impl Fn(&Held) -> bool) -> usize {
        self.0.values().filter(|held| wanted(held)).map(|held| held.permits).sum()
    }

    /// Returns whether a tenant is above its share of the permits, counted with what a newcomer asks for.
    fn is_above_share(
        &self,
        tenants: &[Tenant],
        (bound, tenant): (usize, usize),
        newcomer: (usize, usize),
    ) -> bool {
        let weights: u32 = (0..tenants.len())
            .filter(|t| *t == newcomer.0 || self.held(|held| held.tenant == *t) > 0)
            .map(|t| tenants[t].weight)
            .sum();
        self.with(tenant, newcomer) * weights as usize > bound * tenants[tenant].weight as usize
    }

    fn with(&self, tenant: usize, newcomer: (usize, usize)) -> usize {
        self.held(|held| held.tenant == tenant) + if tenant == newcomer.0 { newcomer.1 } else { 0 }
    }

    /// Returns whether somebody has to give way to a newcomer of one sequence.
    fn somebody_gives_way(
        &self,
        tenants: &[Tenant],
        bound: usize,
        (tenant, adapter): (usize, usize),
    ) -> bool {
        let own = self.with(tenant, (tenant, 1)) * 1_000_000 / tenants[tenant].weight as usize;
        let flow = |t: usize, a: usize| self.held(|held| held.tenant == t && held.adapter == a);
        self.0.values().filter(|held| !held.begun).any(|held| {
            let theirs =
                self.with(held.tenant, (tenant, 1)) * 1_000_000 / tenants[held.tenant].weight as usize;
            if held.tenant == tenant {
                held.adapter != adapter && flow(tenant, held.adapter) > flow(tenant, adapter) + 1
            } else {
                theirs > own + 1 && self.is_above_share(tenants, (bound, held.tenant), (tenant, 1))
            }
        })
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_rules_hold_whatever_comes(bound in 1..20usize, weights in prop::array::uniform4(1..4u32), acts in acts()) {
        let tenants: Vec<Tenant> = (0..4).map(|id| tenant(id as u64, weights[id])).collect();
        let mut admission = Admission::new(bound);
        let mut model = Model::default();
        for (act, tick) in acts.into_iter().zip(0..) {
            let now = Duration::from_millis(tick);
            match act {
                Act::Admit { tenant, adapter, sequences } => {
                    let asked = Asked { tenant: &tenants[tenant], adapter: NAMES[adapter], sequences };
                    let before = model.clone();
                    let newcomer = (tenant, sequences);
                    let fits = before.held(|_| true) + sequences <= bound;
                    match admission.admit(asked, now) {
                        Err(refusal) => {
                            let is_full = matches!(refusal, Refusal::Full { .. });
                            prop_assert!(is_full, "{refusal:?}");
                            prop_assert!(!fits);
                            let must = sequences == 1 && before.somebody_gives_way(&tenants, bound, (tenant, adapter));
                            prop_assert!(!must, "{before:?}");
                        }
                        Ok(admitted) => {
                            prop_assert!(!fits || admitted.shed.is_empty());
                            for (id, _) in &admitted.shed {
                                let shed = before.0[id];
                                prop_assert!(!shed.begun, "a begun answer was shed");
                                prop_assert!((shed.tenant, shed.adapter) != (tenant, adapter));
                                let just = shed.tenant == tenant
                                    || model.is_above_share(&tenants, (bound, shed.tenant), newcomer);
                                prop_assert!(just, "a tenant within its share lost {shed:?} to another");
                                let same_flow = |held: &Held| (held.tenant, held.adapter) == (shed.tenant, shed.adapter);
                                let younger = model.0.range(*id..).skip(1).find(|(_, held)| same_flow(held) && !held.begun);
                                prop_assert!(younger.is_none(), "{younger:?} is younger");
                                model.0.remove(id);
                            }
                            model.0.insert(admitted.id, Held { tenant, adapter, permits: sequences, begun: false });
                        }
                    }
                }
                Act::Begin(at) if !model.0.is_empty() => {
                    let at = at % model.0.len();
                    let (id, held) = model.0.iter_mut().nth(at).unwrap();
                    prop_assert_eq!(admission.begin(*id), !held.begun);
                    held.begun = true;
                }
                Act::Release(at) if !model.0.is_empty() => {
                    let at = at % model.0.len();
                    let (id, held) = model.0.iter_mut().nth(at).unwrap();
                    held.permits -= 1;
                    let (id, ended) = (*id, held.permits == 0);
                    prop_assert_eq!(admission.release(id, now), ended);
                    if ended {
                        model.0.remove(&id);
                    }
                }
                _ => {}
            }
            prop_assert!(admission.held() <= bound);
            prop_assert_eq!(admission.held(), model.held(|_| true));
        }
    }
}
