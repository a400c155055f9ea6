package emulator

import "encoding/json"

// The objects as Clerk writes them: fields in alphabetical order, as in a real capture. A pointer is a
// field that may be null; a test holds every one of them against the canonical payloads.

type verification struct {
	Attempts *int   `json:"attempts"`
	Channel  string `json:"channel,omitempty"` // of a phone number
	ExpireAt *int64 `json:"expire_at"`
	Object   string `json:"object"`
	Status   string `json:"status"`
	Strategy string `json:"strategy"`
}

type link struct {
	ID   string `json:"id"`
	Type string `json:"type"`
}

type emailAddress struct {
	CreatedAt    int64         `json:"created_at"`
	EmailAddress string        `json:"email_address"`
	ID           string        `json:"id"`
	LinkedTo     []link        `json:"linked_to"`
	MatchesSSO   bool          `json:"matches_sso_connection"`
	Object       string        `json:"object"`
	Reserved     bool          `json:"reserved"`
	UpdatedAt    int64         `json:"updated_at"`
	Verification *verification `json:"verification"`
}

type phoneNumber struct {
	BackupCodes   []string      `json:"backup_codes"`
	CreatedAt     int64         `json:"created_at"`
	DefaultSecond bool          `json:"default_second_factor"`
	ID            string        `json:"id"`
	LinkedTo      []link        `json:"linked_to"`
	Object        string        `json:"object"`
	PhoneNumber   string        `json:"phone_number"`
	Reserved      bool          `json:"reserved"`
	ReservedFor   bool          `json:"reserved_for_second_factor"`
	UpdatedAt     int64         `json:"updated_at"`
	Verification  *verification `json:"verification"`
}

type externalAccount struct {
	ApprovedScopes   string        `json:"approved_scopes"`
	AvatarURL        string        `json:"avatar_url"`
	CreatedAt        int64         `json:"created_at"`
	EmailAddress     string        `json:"email_address"`
	FirstName        string        `json:"first_name"`
	ID               string        `json:"id"`
	IdentificationID string        `json:"identification_id"`
	ImageURL         string        `json:"image_url"`
	Label            *string       `json:"label"`
	LastName         string        `json:"last_name"`
	Object           string        `json:"object"`
	PhoneNumber      *string       `json:"phone_number"`
	Provider         string        `json:"provider"`
	ProviderUserID   string        `json:"provider_user_id"`
	PublicMetadata   metadata      `json:"public_metadata"`
	UpdatedAt        int64         `json:"updated_at"`
	Username         string        `json:"username"`
	Verification     *verification `json:"verification"`
}

// metadata is a JSON object as it stands; empty means {}.
type metadata string

func (m metadata) MarshalJSON() ([]byte, error) {
	if m == "" {
		return []byte("{}"), nil
	}
	return []byte(m), nil
}

// none is an array that stays empty.
type none struct{}

func (none) MarshalJSON() ([]byte, error) { return []byte("[]"), nil }

type user struct {
	BackupCodeEnabled        bool              `json:"backup_code_enabled"`
	Banned                   bool              `json:"banned"`
	BypassClientTrust        bool              `json:"bypass_client_trust"`
	CreateOrganization       bool              `json:"create_organization_enabled"`
	CreateOrganizationsLimit *int              `json:"create_organizations_limit"`
	CreatedAt                int64             `json:"created_at"`
	DeleteSelf               bool              `json:"delete_self_enabled"`
	Deprovisioned            bool              `json:"deprovisioned"`
	EmailAddresses           []emailAddress    `json:"email_addresses"`
	EnterpriseAccounts       none              `json:"enterprise_accounts"`
	ExternalAccounts         []externalAccount `json:"external_accounts"`
	ExternalID               *string           `json:"external_id"`
	FirstName                *string           `json:"first_name"`
	HasImage                 bool              `json:"has_image"`
	ID                       string            `json:"id"`
	ImageURL                 string            `json:"image_url"`
	LastActiveAt             *int64            `json:"last_active_at"`
	LastName                 *string           `json:"last_name"`
	LastSignInAt             *int64            `json:"last_sign_in_at"`
	LegalAcceptedAt          *int64            `json:"legal_accepted_at"`
	Locale                   *string           `json:"locale"`
	Locked                   bool              `json:"locked"`
	LockoutExpires           *int64            `json:"lockout_expires_in_seconds"`
	MFADisabledAt            *int64            `json:"mfa_disabled_at"`
	MFAEnabledAt             *int64            `json:"mfa_enabled_at"`
	Object                   string            `json:"object"`
	Passkeys                 none              `json:"passkeys"`
	PasswordEnabled          bool              `json:"password_enabled"`
	PasswordUpdatedAt        *int64            `json:"password_last_updated_at"`
	PhoneNumbers             []phoneNumber     `json:"phone_numbers"`
	PrimaryEmail             *string           `json:"primary_email_address_id"`
	PrimaryPhone             *string           `json:"primary_phone_number_id"`
	PrimaryWeb3              *string           `json:"primary_web3_wallet_id"`
	PrivateMetadata          metadata          `json:"private_metadata"`
	ProfileImageURL          string            `json:"profile_image_url"`
	PublicMetadata           metadata          `json:"public_metadata"`
	SAMLAccounts             none              `json:"saml_accounts"`
	TOTPEnabled              bool              `json:"totp_enabled"`
	TwoFactorEnabled         bool              `json:"two_factor_enabled"`
	UnsafeMetadata           metadata          `json:"unsafe_metadata"`
	UpdatedAt                int64             `json:"updated_at"`
	Username                 *string           `json:"username"`
	VerificationAttempts     *int              `json:"verification_attempts_remaining"`
	Web3Wallets              none              `json:"web3_wallets"`

	json []byte // as it was last announced; embedded in sessions
}

type sessionActivity struct {
	BrowserName    string `json:"browser_name"`
	BrowserVersion string `json:"browser_version"`
	City           string `json:"city"`
	Country        string `json:"country"`
	DeviceType     string `json:"device_type"`
	ID             string `json:"id"`
	IPAddress      string `json:"ip_address"`
	IsMobile       bool   `json:"is_mobile"`
	Object         string `json:"object"`
}

type session struct {
	AbandonAt      int64            `json:"abandon_at"`
	Actor          *struct{}        `json:"actor"`
	ClientID       string           `json:"client_id"`
	CreatedAt      int64            `json:"created_at"`
	ExpireAt       int64            `json:"expire_at"`
	ID             string           `json:"id"`
	LastActiveAt   int64            `json:"last_active_at"`
	LastActiveOrg  *string          `json:"last_active_organization_id"`
	LatestActivity *sessionActivity `json:"latest_activity"`
	Object         string           `json:"object"`
	Status         string           `json:"status"`
	UpdatedAt      int64            `json:"updated_at"`
	User           json.RawMessage  `json:"user"`
	UserID         string           `json:"user_id"`
}

type organization struct {
	AdminDelete        bool     `json:"admin_delete_enabled"`
	CreatedAt          int64    `json:"created_at"`
	CreatedBy          string   `json:"created_by"`
	HasImage           bool     `json:"has_image"`
	ID                 string   `json:"id"`
	ImageURL           string   `json:"image_url"`
	LastActiveAt       int64    `json:"last_active_at"`
	MaxMemberships     int      `json:"max_allowed_memberships"`
	MembersCount       int      `json:"members_count"`
	MissingElevated    bool     `json:"missing_member_with_elevated_permissions"`
	Name               string   `json:"name"`
	Object             string   `json:"object"`
	PendingInvitations int      `json:"pending_invitations_count"`
	PrivateMetadata    metadata `json:"private_metadata"`
	PublicMetadata     metadata `json:"public_metadata"`
	RoleSetKey         string   `json:"role_set_key"`
	Slug               string   `json:"slug"`
	UpdatedAt          int64    `json:"updated_at"`

	json        []byte
	members     []*membership
	invitations []*invitation // pending ones
	domains     []*domain
}

type publicUserData struct {
	Banned          bool    `json:"banned"`
	Deprovisioned   bool    `json:"deprovisioned"`
	FirstName       *string `json:"first_name"`
	HasImage        bool    `json:"has_image"`
	Identifier      string  `json:"identifier"`
	ImageURL        string  `json:"image_url"`
	LastName        *string `json:"last_name"`
	ProfileImageURL string  `json:"profile_image_url"`
	UserID          string  `json:"user_id"`
	Username        *string `json:"username"`
}

type membership struct {
	CreatedAt       int64           `json:"created_at"`
	ID              string          `json:"id"`
	Object          string          `json:"object"`
	Organization    json.RawMessage `json:"organization"`
	Permissions     []string        `json:"permissions"`
	PrivateMetadata metadata        `json:"private_metadata"`
	PublicMetadata  metadata        `json:"public_metadata"`
	PublicUserData  publicUserData  `json:"public_user_data"`
	Role            string          `json:"role"`
	RoleName        string          `json:"role_name"`
	UpdatedAt       int64           `json:"updated_at"`

	org  *organization
	life *life
}

type publicInviterData struct {
	FirstName  *string `json:"first_name"`
	HasImage   bool    `json:"has_image"`
	Identifier string  `json:"identifier"`
	ImageURL   string  `json:"image_url"`
	LastName   *string `json:"last_name"`
	UserID     string  `json:"user_id"`
}

type publicOrganizationData struct {
	HasImage bool   `json:"has_image"`
	ID       string `json:"id"`
	ImageURL string `json:"image_url"`
	Name     string `json:"name"`
	Slug     string `json:"slug"`
}

type invitation struct {
	CreatedAt              int64                  `json:"created_at"`
	EmailAddress           string                 `json:"email_address"`
	ExpiresAt              int64                  `json:"expires_at"`
	ID                     string                 `json:"id"`
	InviterID              string                 `json:"inviter_id"`
	Object                 string                 `json:"object"`
	OrganizationID         string                 `json:"organization_id"`
	PrivateMetadata        metadata               `json:"private_metadata"`
	PublicInviterData      publicInviterData      `json:"public_inviter_data"`
	PublicMetadata         metadata               `json:"public_metadata"`
	PublicOrganizationData publicOrganizationData `json:"public_organization_data"`
	Role                   string                 `json:"role"`
	RoleName               string                 `json:"role_name"`
	Status                 string                 `json:"status"`
	UpdatedAt              int64                  `json:"updated_at"`
	URL                    string                 `json:"url"`
	UserID                 string                 `json:"user_id,omitempty"` // of an accepted one
}

type domainVerification struct {
	Attempts   int    `json:"attempts"`
	ExpireAt   *int64 `json:"expire_at"`
	Status     string `json:"status"`
	Strategy   string `json:"strategy"`
	VerifiedAt int64  `json:"verified_at"`
}

type domain struct {
	AffiliationEmail        string                 `json:"affiliation_email_address"`
	AffiliationVerification *domainVerification    `json:"affiliation_verification"`
	CreatedAt               int64                  `json:"created_at"`
	EnrollmentMode          string                 `json:"enrollment_mode"`
	ID                      string                 `json:"id"`
	Name                    string                 `json:"name"`
	Object                  string                 `json:"object"`
	OrganizationID          string                 `json:"organization_id"`
	OwnershipVerification   *domainVerification    `json:"ownership_verification"`
	PublicOrganizationData  publicOrganizationData `json:"public_organization_data"`
	PendingInvitations      int                    `json:"total_pending_invitations"`
	PendingSuggestions      int                    `json:"total_pending_suggestions"`
	UpdatedAt               int64                  `json:"updated_at"`
	Verification            *domainVerification    `json:"verification"`
}

type permission struct {
	CreatedAt   int64  `json:"created_at"`
	Description string `json:"description"`
	ID          string `json:"id"`
	Key         string `json:"key"`
	Name        string `json:"name"`
	Object      string `json:"object"`
	Type        string `json:"type"`
	UpdatedAt   int64  `json:"updated_at"`
}

type role struct {
	CreatedAt         int64        `json:"created_at"`
	Description       string       `json:"description"`
	ID                string       `json:"id"`
	IsCreatorEligible bool         `json:"is_creator_eligible"`
	Key               string       `json:"key"`
	Name              string       `json:"name"`
	Object            string       `json:"object"`
	Permissions       []permission `json:"permissions"`
	UpdatedAt         int64        `json:"updated_at"`
}

type signUpInvitation struct {
	CreatedAt      int64    `json:"created_at"`
	EmailAddress   string   `json:"email_address"`
	ExpiresAt      int64    `json:"expires_at"`
	ID             string   `json:"id"`
	Object         string   `json:"object"`
	PublicMetadata metadata `json:"public_metadata"`
	Revoked        bool     `json:"revoked"`
	Status         string   `json:"status"`
	UpdatedAt      int64    `json:"updated_at"`
	URL            string   `json:"url"`
}

type waitlistEntry struct {
	CreatedAt    int64             `json:"created_at"`
	EmailAddress string            `json:"email_address"`
	ID           string            `json:"id"`
	Invitation   *signUpInvitation `json:"invitation"`
	IsLocked     bool              `json:"is_locked"`
	Object       string            `json:"object"`
	Status       string            `json:"status"`
	UpdatedAt    int64             `json:"updated_at"`
}

type payer struct {
	CreatedAt        int64   `json:"created_at"`
	Email            string  `json:"email"`
	FirstName        *string `json:"first_name"`
	ID               string  `json:"id"`
	ImageURL         string  `json:"image_url"`
	LastName         *string `json:"last_name"`
	Object           string  `json:"object"`
	OrganizationID   string  `json:"organization_id"`
	OrganizationName string  `json:"organization_name"`
	UpdatedAt        int64   `json:"updated_at"`
	UserID           string  `json:"user_id"`
}

type plan struct {
	Amount      int    `json:"amount"`
	Currency    string `json:"currency"`
	ID          string `json:"id"`
	IsRecurring bool   `json:"is_recurring"`
	Name        string `json:"name"`
	Slug        string `json:"slug"`
}

// item is a subscription item; inside its subscription it has no payer.
type item struct {
	CreatedAt      int64   `json:"created_at"`
	ID             string  `json:"id"`
	Interval       string  `json:"interval"`
	IsFreeTrial    bool    `json:"is_free_trial"`
	Object         string  `json:"object"`
	Payer          *payer  `json:"payer,omitempty"`
	PeriodEnd      *int64  `json:"period_end"`
	PeriodStart    int64   `json:"period_start"`
	Plan           plan    `json:"plan"`
	PlanID         string  `json:"plan_id"`
	Status         string  `json:"status"`
	SubscriptionID *string `json:"subscription_id"`
	UpdatedAt      int64   `json:"updated_at"`
}

type subscription struct {
	ActiveAt        int64   `json:"active_at"`
	CanceledAt      *int64  `json:"canceled_at"`
	CreatedAt       int64   `json:"created_at"`
	EndedAt         *int64  `json:"ended_at"`
	ID              string  `json:"id"`
	Items           []item  `json:"items"`
	LatestPaymentID *string `json:"latest_payment_id"`
	Object          string  `json:"object"`
	PastDueAt       *int64  `json:"past_due_at"`
	Payer           payer   `json:"payer"`
	PayerID         string  `json:"payer_id"`
	PaymentSourceID *string `json:"payment_source_id"`
	Status          string  `json:"status"`
	UpdatedAt       int64   `json:"updated_at"`
}

type money struct {
	Amount          int    `json:"amount"`
	AmountFormatted string `json:"amount_formatted"`
	Currency        string `json:"currency"`
	CurrencySymbol  string `json:"currency_symbol"`
}

type payee struct {
	GatewayExternalID string `json:"gateway_external_id"`
	GatewayStatus     string `json:"gateway_status"`
	GatewayType       string `json:"gateway_type"`
	ID                string `json:"id"`
}

type paymentSource struct {
	CardType                 string `json:"card_type"`
	Gateway                  string `json:"gateway"`
	GatewayExternalAccountID string `json:"gateway_external_account_id"`
	GatewayExternalID        string `json:"gateway_external_id"`
	ID                       string `json:"id"`
	Last4                    string `json:"last4"`
	PaymentMethod            string `json:"payment_method"`
	Status                   string `json:"status"`
}

type credit struct {
	Amount             money   `json:"amount"`
	CycleDaysRemaining int     `json:"cycle_days_remaining"`
	CycleDaysTotal     int     `json:"cycle_days_total"`
	CycleRemaining     float64 `json:"cycle_remaining_percent"`
}

type pricedPlan struct {
	Amount              int    `json:"amount"`
	AnnualMonthlyAmount int    `json:"annual_monthly_amount"`
	Currency            string `json:"currency"`
	Description         string `json:"description"`
	HasBaseFee          bool   `json:"has_base_fee"`
	ID                  string `json:"id"`
	InstanceID          string `json:"instance_id"`
	Interval            int    `json:"interval"`
	IsDefault           bool   `json:"is_default"`
	IsProrated          bool   `json:"is_prorated"`
	IsRecurring         bool   `json:"is_recurring"`
	Name                string `json:"name"`
	Period              string `json:"period"`
	ProductID           string `json:"product_id"`
	PubliclyVisible     bool   `json:"publicly_visible"`
	Slug                string `json:"slug"`
}

type paidItem struct {
	Amount            money      `json:"amount"`
	CanceledAt        *int64     `json:"canceled_at"`
	CreatedAt         int64      `json:"created_at"`
	Credit            credit     `json:"credit"`
	ID                string     `json:"id"`
	Interval          string     `json:"interval"`
	LifetimePaid      int        `json:"lifetime_paid"`
	NextPaymentAmount int        `json:"next_payment_amount"`
	NextPaymentDate   *int64     `json:"next_payment_date"`
	Object            string     `json:"object"`
	PastDueAt         *int64     `json:"past_due_at"`
	PeriodEnd         *int64     `json:"period_end"`
	PeriodStart       int64      `json:"period_start"`
	Plan              pricedPlan `json:"plan"`
	PlanID            string     `json:"plan_id"`
	PlanPeriod        string     `json:"plan_period"`
	ProrationDate     string     `json:"proration_date"`
	Status            string     `json:"status"`
	UpdatedAt         int64      `json:"updated_at"`
}

type totals struct {
	GrandTotal money `json:"grand_total"`
	Subtotal   money `json:"subtotal"`
	TaxTotal   money `json:"tax_total"`
}

type payment struct {
	BillingDate       int64         `json:"billing_date"`
	ChargeType        string        `json:"charge_type"`
	CreatedAt         int64         `json:"created_at"`
	FailedAt          *int64        `json:"failed_at"`
	FailedReason      *failure      `json:"failed_reason"`
	GatewayExternalID string        `json:"gateway_external_id"`
	ID                string        `json:"id"`
	InstanceID        string        `json:"instance_id"`
	InvoiceID         string        `json:"invoice_id"`
	PaidAt            *int64        `json:"paid_at"`
	Payee             payee         `json:"payee"`
	Payer             payer         `json:"payer"`
	PaymentID         string        `json:"payment_id"`
	PaymentSource     paymentSource `json:"payment_source"`
	StatementID       string        `json:"statement_id"`
	Status            string        `json:"status"`
	SubscriptionItems []paidItem    `json:"subscription_items"`
	Totals            totals        `json:"totals"`
	UpdatedAt         int64         `json:"updated_at"`
}

type failure struct {
	Code        string `json:"code"`
	DeclineCode string `json:"decline_code"`
}

// email and message carry one-time codes, as Clerk's do. No table mirrors them.
type email struct {
	Body           string          `json:"body"`
	BodyPlain      string          `json:"body_plain"`
	Data           json.RawMessage `json:"data"`
	ByClerk        bool            `json:"delivered_by_clerk"`
	EmailAddressID *string         `json:"email_address_id"`
	FromName       string          `json:"from_email_name"`
	ID             string          `json:"id"`
	Object         string          `json:"object"`
	ReplyTo        *string         `json:"reply_to_email_name"`
	Slug           string          `json:"slug"`
	Status         string          `json:"status"`
	Subject        string          `json:"subject"`
	To             string          `json:"to_email_address"`
	UserID         *string         `json:"user_id"`
}

type message struct {
	CreatedAt     int64    `json:"created_at"`
	Data          metadata `json:"data"`
	ByClerk       bool     `json:"delivered_by_clerk"`
	From          string   `json:"from_phone_number"`
	ID            string   `json:"id"`
	Message       string   `json:"message"`
	Object        string   `json:"object"`
	PhoneNumberID *string  `json:"phone_number_id"`
	Slug          string   `json:"slug"`
	Status        string   `json:"status"`
	To            string   `json:"to_phone_number"`
	UserID        *string  `json:"user_id"`
}

type deleted struct {
	Deleted    bool    `json:"deleted"`
	ExternalID *string `json:"external_id,omitempty"` // of a user
	ID         string  `json:"id"`
	Object     string  `json:"object"`
	Slug       string  `json:"slug,omitempty"` // of an organization
}
