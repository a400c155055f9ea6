package emulator

import (
	"fmt"
	"time"
)

const month = 30 * day

// subscribe gives a new person the free plan.
func (l *life) subscribe() {
	c := l.c
	u := l.user
	at := c.tick()
	p := payer{
		CreatedAt: at, Email: l.identifier(), FirstName: u.FirstName, ID: c.id("cpayer"), ImageURL: u.ImageURL, LastName: u.LastName,
		Object: "commerce_payer", UpdatedAt: at, UserID: u.ID,
	}
	l.sub = &subscription{
		ActiveAt: at, CreatedAt: at, ID: c.id("csub"), Object: "commerce_subscription", Payer: p, PayerID: p.ID, Status: "active",
	}
	l.free = l.newItem(freePlan, "active")
	l.saveSubscription("subscription.created")
	l.saveItem(l.free, "active")
	c.emit("subscription.active", l.sub.ID, l, l.sub.UpdatedAt, c.render(l.sub))
}

func (l *life) newItem(p plan, status string) *item {
	at := l.c.tick()
	i := &item{
		CreatedAt: at, ID: l.c.id("csub_item"), Interval: "month", Object: "commerce_subscription_item", Payer: &l.sub.Payer,
		PeriodStart: at, Plan: p, PlanID: p.ID, Status: status, SubscriptionID: &l.sub.ID, UpdatedAt: at,
	}
	if p.IsRecurring {
		i.PeriodEnd = ptr(at + month.Milliseconds())
	}
	return i
}

// saveItem announces a changed item by the verb of its event.
func (l *life) saveItem(i *item, verb string) {
	i.UpdatedAt = l.c.tick()
	l.announceItem(i, verb)
}

// announceItem announces an item that did not change since, as of a trial that nears its end.
func (l *life) announceItem(i *item, verb string) {
	l.c.emit("subscriptionItem."+verb, i.ID, l, i.UpdatedAt, l.c.render(i))
}

// saveSubscription announces the subscription with its current items, which have no payer in there.
func (l *life) saveSubscription(typ string) {
	s := l.sub
	s.Items = s.Items[:0]
	for _, i := range []*item{l.free, l.pro} {
		if i != nil && i.Status != "ended" && i.Status != "abandoned" {
			inside := *i
			inside.Payer = nil
			s.Items = append(s.Items, inside)
		}
	}
	if s.Items == nil {
		s.Items = []item{}
	}
	s.UpdatedAt = l.c.tick()
	l.c.emit(typ, s.ID, l, s.UpdatedAt, l.c.render(s))
}

func dollars(cents int) money {
	return money{Amount: cents, AmountFormatted: fmt.Sprintf("$%d.%02d", cents/100, cents%100), Currency: "USD", CurrencySymbol: "$"}
}

func (l *life) pay(kind string) *payment {
	c := l.c
	at := c.tick()
	i := l.pro
	if l.sub.PaymentSourceID == nil {
		l.sub.PaymentSourceID = ptr(c.id("cps"))
	}
	p := &payment{
		BillingDate: at, ChargeType: kind, CreatedAt: at, GatewayExternalID: "pi_" + i.ID[len(i.ID)-20:], ID: c.id("pa"),
		InstanceID: c.cfg.InstanceID, InvoiceID: c.id("cinv"), PaymentID: c.id("cpa"), StatementID: c.id("stmt"), Status: "pending", UpdatedAt: at,
		Payee: payee{GatewayExternalID: "acct_1ExampleExample", GatewayStatus: "active", GatewayType: "stripe", ID: "cpayee_34e1PckZcvjDg6L5b4Z5zNYCHBi"},
		Payer: l.sub.Payer,
		PaymentSource: paymentSource{
			CardType: "visa", Gateway: "stripe", GatewayExternalAccountID: "acct_1ExampleExample", GatewayExternalID: "pm_1ExampleExampleExample",
			ID: *l.sub.PaymentSourceID, Last4: "4242", PaymentMethod: "card", Status: "active",
		},
		Totals: totals{GrandTotal: dollars(2200), Subtotal: dollars(2000), TaxTotal: dollars(200)},
		SubscriptionItems: []paidItem{{
			Amount: dollars(2000), CreatedAt: i.CreatedAt, Credit: credit{Amount: dollars(0), CycleDaysTotal: 31}, ID: i.ID, Interval: "month",
			LifetimePaid: 2000, NextPaymentAmount: 2000, NextPaymentDate: i.PeriodEnd, Object: "commerce_subscription_item",
			PeriodEnd: i.PeriodEnd, PeriodStart: i.PeriodStart, PlanID: proPlan.ID, PlanPeriod: "month",
			ProrationDate: time.UnixMilli(at).UTC().Format(time.DateOnly), Status: i.Status, UpdatedAt: i.UpdatedAt,
			Plan: pricedPlan{
				Amount: 2000, AnnualMonthlyAmount: 1800, Currency: "USD", Description: "Professional plan", HasBaseFee: true, ID: proPlan.ID,
				InstanceID: c.cfg.InstanceID, Interval: 1, IsProrated: true, IsRecurring: true, Name: "Pro", Period: "month",
				ProductID: "cprd_34e1PceHES7dzeEw11oLXWI0QOe", PubliclyVisible: true, Slug: "pro",
			},
		}},
	}
	l.sub.LatestPaymentID = &p.PaymentID
	c.emit("paymentAttempt.created", p.ID, l, at, c.render(p))
	return p
}

func (l *life) settlePayment(p *payment, paid bool) {
	p.UpdatedAt = l.c.tick()
	if paid {
		p.Status, p.PaidAt = "paid", &p.UpdatedAt
		p.SubscriptionItems[0].Status = "active"
	} else {
		p.Status, p.FailedAt = "failed", &p.UpdatedAt
		p.FailedReason = &failure{Code: "card_declined", DeclineCode: "insufficient_funds"}
		p.SubscriptionItems[0].Status = "past_due"
	}
	p.SubscriptionItems[0].UpdatedAt = p.UpdatedAt
	l.c.emit("paymentAttempt.updated", p.ID, l, p.UpdatedAt, l.c.render(p))
}

func (l *life) subscribed() bool { return l.sub != nil && l.sub.EndedAt == nil }

// upgrade buys the paid plan; what follows after the first payment is up to then.
func (l *life) upgrade() { l.buy(nil) }

func (l *life) buy(then func()) {
	if !l.subscribed() || l.pro != nil {
		return
	}
	l.pro = l.newItem(proPlan, "incomplete")
	l.announceItem(l.pro, "created")
	l.announceItem(l.pro, "incomplete")
	p := l.pay("checkout")
	l.later(5*time.Second, func() {
		if !l.subscribed() || l.pro == nil {
			return
		}
		l.settlePayment(p, true)
		l.activatePro(false)
		if then != nil {
			then()
		}
	})
}

func (l *life) activatePro(trial bool) {
	l.pro.Status, l.pro.IsFreeTrial = "active", trial
	l.saveItem(l.pro, "active")
	if l.free != nil {
		l.free.Status = "ended"
		l.saveItem(l.free, "ended")
		l.free = nil
	}
	l.saveSubscription("subscription.updated")
}

// trial starts the paid plan for nothing, is told that it ends, and pays.
func (l *life) trial() {
	if !l.subscribed() || l.pro != nil {
		return
	}
	l.pro = l.newItem(proPlan, "active")
	l.pro.PeriodEnd = ptr(l.pro.PeriodStart + (14 * day).Milliseconds())
	l.pro.IsFreeTrial = true
	l.announceItem(l.pro, "created")
	l.activatePro(true)
	l.c.after(11*day, func() {
		if l.gone || l.pro == nil {
			return
		}
		l.announceItem(l.pro, "freeTrialEnding")
		l.c.after(3*day, func() {
			if !l.gone && l.pro != nil {
				l.renew(true)
			}
		})
	})
}

// renew moves the period on and pays for it.
func (l *life) renew(paid bool) {
	l.pro.IsFreeTrial = false
	l.pro.PeriodStart = *l.pro.PeriodEnd
	l.pro.PeriodEnd = ptr(l.pro.PeriodStart + month.Milliseconds())
	l.saveItem(l.pro, "updated")
	p := l.pay("recurring")
	l.settlePayment(p, paid)
	if paid {
		l.saveSubscription("subscription.updated")
		return
	}
	l.pro.Status = "past_due"
	l.saveItem(l.pro, "pastDue")
	l.sub.Status, l.sub.PastDueAt = "past_due", ptr(l.c.now)
	l.saveSubscription("subscription.pastDue")
}

// failRenewal buys, fails to pay for the second month, and pays two days later.
func (l *life) failRenewal() {
	l.buy(func() {
		l.c.after(month, func() {
			if l.gone || l.pro == nil {
				return
			}
			l.renew(false)
			l.later(2*day, func() {
				if l.pro == nil {
					return
				}
				p := l.pay("recurring")
				l.settlePayment(p, true)
				l.pro.Status = "active"
				l.saveItem(l.pro, "active")
				l.sub.Status, l.sub.PastDueAt = "active", nil
				l.saveSubscription("subscription.active")
			})
		})
	})
}

// cancel cancels at the end of the period, from when on the free plan is upcoming.
func (l *life) cancel() {
	l.pro.Status = "canceled"
	l.saveItem(l.pro, "canceled")
	l.free = l.newItem(freePlan, "upcoming")
	l.free.PeriodStart = *l.pro.PeriodEnd
	l.announceItem(l.free, "created")
	l.announceItem(l.free, "upcoming")
	l.sub.CanceledAt = ptr(l.c.now)
	l.saveSubscription("subscription.updated")
}

// cancelOnce buys, cancels and thinks better of it.
func (l *life) cancelOnce() {
	l.buy(func() {
		l.later(5*day, func() {
			if l.pro == nil {
				return
			}
			l.cancel()
			l.later(day, func() {
				if l.pro == nil || l.free == nil {
					return
				}
				l.free.Status = "abandoned"
				l.saveItem(l.free, "abandoned")
				l.free = nil
				l.pro.Status, l.sub.CanceledAt = "active", nil
				l.saveItem(l.pro, "active")
				l.saveSubscription("subscription.updated")
			})
		})
	})
}

// cancelForGood buys, cancels, and is back on the free plan after the month.
func (l *life) cancelForGood() {
	l.buy(func() {
		l.later(5*day, func() {
			if l.pro == nil {
				return
			}
			l.cancel()
			l.c.after(month, func() {
				if l.gone || l.pro == nil || l.free == nil {
					return
				}
				l.pro.Status = "ended"
				l.saveItem(l.pro, "ended")
				l.pro = nil
				l.free.Status = "active"
				l.saveItem(l.free, "active")
				l.sub.CanceledAt = nil
				l.saveSubscription("subscription.updated")
			})
		})
	})
}

// unsubscribe ends everything, because the person leaves.
func (l *life) unsubscribe() {
	if !l.subscribed() {
		return
	}
	for _, i := range []*item{l.free, l.pro} {
		if i != nil {
			i.Status = "ended"
			l.saveItem(i, "ended")
		}
	}
	l.free, l.pro = nil, nil
	l.sub.Status, l.sub.EndedAt = "ended", ptr(l.c.now)
	l.saveSubscription("subscription.updated")
}
